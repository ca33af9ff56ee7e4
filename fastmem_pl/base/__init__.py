"""What everything else stands on: errors, registries, files, the Hub, phases."""
