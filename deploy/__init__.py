"""Files that put an artifact on the machine it is for; one module per target behind ``deploy.targets``."""
