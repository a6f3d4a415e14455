"""What every room stands on: errors, atomic sealed files, resumable arrays, ranks, configuration classes."""
