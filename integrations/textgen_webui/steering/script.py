from steer_plugins_textgen.extension import *  # noqa: F403
