"""What a comparison or a run found, as a table for the terminal and as one HTML file."""

from maskft.report.curves import tradeoff_curve as tradeoff_curve
from maskft.report.curves import training_curves as training_curves
from maskft.report.html import Link as Link
from maskft.report.html import Page as Page
from maskft.report.html import PageTable as PageTable
from maskft.report.html import Picture as Picture
from maskft.report.html import plain_text as plain_text
from maskft.report.html import write_html as write_html
from maskft.report.table import interval_text as interval_text
from maskft.report.table import narrow_table as narrow_table
from maskft.report.table import without_empty_columns as without_empty_columns
