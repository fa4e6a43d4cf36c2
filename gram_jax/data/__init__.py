"""From files of text and preferences to token ids."""
