"""A request while it is decoded: its branches, its tokens, its growing text and where the text stops."""
