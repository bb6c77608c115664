"""Pure tensor rules of Mask Fine-Tuning; nothing here knows of PEFT or of a trainer."""

from maskft.masks.linear import apply_mask as apply_mask
from maskft.masks.linear import apply_packed as apply_packed
from maskft.masks.linear import masked_linear as masked_linear
from maskft.masks.linear import straight_through_gradient as straight_through_gradient
from maskft.masks.packing import check_packed as check_packed
from maskft.masks.packing import majority_mask as majority_mask
from maskft.masks.packing import num_flipped_bits as num_flipped_bits
from maskft.masks.packing import num_kept_bits as num_kept_bits
from maskft.masks.packing import pack_mask as pack_mask
from maskft.masks.packing import packed_shape as packed_shape
from maskft.masks.packing import shuffled_mask as shuffled_mask
from maskft.masks.packing import unpack_mask as unpack_mask
from maskft.masks.selection import ScoreTransform as ScoreTransform
from maskft.masks.selection import Selection as Selection
from maskft.masks.selection import num_kept as num_kept
from maskft.masks.selection import select as select
