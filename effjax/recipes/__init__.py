"""One study a file: config and arms."""
