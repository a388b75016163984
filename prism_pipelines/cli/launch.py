"""`accelerate launch` without its list of the defaults it takes: `python -m prism_pipelines.cli.launch <its flags>`."""

import logging

from accelerate.commands import launch

if __name__ == "__main__":
    logging.getLogger(launch.__name__).setLevel(logging.ERROR)
    launch.main()
