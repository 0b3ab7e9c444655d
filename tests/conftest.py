"""What holds for all tests: hypothesis sets no time limit, because a loaded machine is not a defect."""

from hypothesis import settings

settings.register_profile("recap", deadline=None)
settings.load_profile("recap")
