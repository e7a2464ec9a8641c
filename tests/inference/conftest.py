from models.families import one_thread  # noqa: F401
