"""The one place where maskft touches PEFT's closed list of methods.

`peft.register_peft_method` accepts only names of the enum `PeftType` and offers no way to add one. The member is
added once, at import, in the way the standard library builds members of a string enum; JSON, pickle and deepcopy
know it afterwards. A PEFT that has a MASKFT of its own would be used as it is.
"""

from peft.utils.peft_types import PeftType


def _extend_peft_type(name: str) -> PeftType:
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(PeftType.__members__)
    member.__objclass__ = PeftType
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


MASKFT = _extend_peft_type("MASKFT")
