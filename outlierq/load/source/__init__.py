"""A folder of safetensors: its files checked, read, fingerprinted, and watched for changes."""
