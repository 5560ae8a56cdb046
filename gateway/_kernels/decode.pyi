from typing_extensions import Buffer

def fill(
    dst: Buffer,
    dst_offset: int,
    datatype_index: int,
    shape: tuple[int, ...],
    data: object,
    strict: bool,
) -> int: ...
