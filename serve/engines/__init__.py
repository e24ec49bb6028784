"""What other engines need to serve the same checkpoints, for `pard-deploy`."""
