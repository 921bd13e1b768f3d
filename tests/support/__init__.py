"""What several test files need and no single one owns."""
