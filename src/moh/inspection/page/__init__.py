"""One self-contained HTML file to explore which head did what with each token or patch."""

from moh.inspection.page.page import HeadPage, head_page
from moh.inspection.page.samples import PageSample, image_sample, text_sample

__all__ = ["HeadPage", "PageSample", "head_page", "image_sample", "text_sample"]
