"""Write files and directories whole or not at all, share their bytes, and spell JSON and YAML."""
