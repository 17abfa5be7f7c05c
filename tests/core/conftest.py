import os

from hypothesis import settings

settings.register_profile("pack", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("pack")
