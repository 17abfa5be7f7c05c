"""check_video.py FILE FRAMES: reads a video back and fails if it is empty, too short, or one still grey."""

import sys

import imageio.v3 as iio

path, frames = sys.argv[1], int(sys.argv[2])
video = iio.imread(path, plugin="pyav")  # [T, H, W, 3], uint8
if len(video) != frames:
    sys.exit(f"Got {len(video)} frames in {path}; {frames} were asked for.")
if video.std() < 1:
    sys.exit(f"Got a picture without contrast in {path} (standard deviation {video.std():.2f}).")
print(f"{path}: {len(video)} frames of {video.shape[2]}x{video.shape[1]}")
