"""Images and videos: patches for the vision tower, and placeholders in the prompt. No torch.

    images, videos --prepare--> pictures
    text, pictures --insert_placeholders--> text, pictures in its order --tokenizer--> ids --expand--> ids and spans

Invariant: a file that is damaged, too large or without a placeholder in the prompt is refused before any computation.

Run it:  python -m pytest tests/multimodal
"""

from blockpress.multimodal.images import ProcessedImage, open_image, prepare_images
from blockpress.multimodal.placeholders import ExpandedPrompt, ImageSpan, expand, insert_placeholders
from blockpress.multimodal.sources import Source, from_data_url
from blockpress.multimodal.video import Video, prepare_videos, read_video

__all__ = [
    "ExpandedPrompt",
    "ImageSpan",
    "ProcessedImage",
    "Source",
    "Video",
    "expand",
    "from_data_url",
    "insert_placeholders",
    "open_image",
    "prepare_images",
    "prepare_videos",
    "read_video",
]
