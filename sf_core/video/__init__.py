"""Frames to files and back: clips (mp4, webm, gif and what else PyAV decodes), pictures, folders of pictures."""

from .clip import Clip, open_clip, read_video
from .destination import check_destination, check_folder, check_names, check_outputs
from .picture import contact_sheet, fitted, save_picture
from .write import gif_rate, recover, save_video

__all__ = [
    "Clip",
    "check_destination",
    "check_folder",
    "check_names",
    "check_outputs",
    "contact_sheet",
    "fitted",
    "gif_rate",
    "open_clip",
    "read_video",
    "recover",
    "save_picture",
    "save_video",
]
