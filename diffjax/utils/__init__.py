"""What every room uses: pytrees, errors, files, signals, processor, pictures, seeds, progress; it imports no room."""
