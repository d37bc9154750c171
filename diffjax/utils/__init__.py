"""What every room uses: pytrees, errors, files, signals, pictures, seeds and progress. It imports no other room."""
