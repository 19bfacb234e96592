"""What people show: images and videos become patches for the vision tower, and places in the prompt. No torch.

    images, videos --prepare--> pictures
    text, pictures --lay_out--> text, pictures in its order --tokenizer--> ids --expand--> ids and runs

Invariant: a file that is damaged, too large or of no place in the prompt is refused before anything is computed.

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
