"""What a comparison found, as a table for the terminal and as one HTML file."""

from maskft.report.html import write_html as write_html
from maskft.report.table import render_table as render_table
