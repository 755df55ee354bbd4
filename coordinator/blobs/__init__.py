"""Files of jobs: in a folder or in any S3 store."""
