"""What a reference file says of its paper."""

from typing import NamedTuple


class Paper(NamedTuple):
    """The bibliographic record of one paper; tables, indexes and BibTeX are made from these."""

    slug: str
    name: str
    title: str
    authors: tuple[str, ...]
    venue: str
    year: int
    arxiv: str
    official_code: str
    family: str
    bibtex_key: str
