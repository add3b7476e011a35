"""The recurrence of chunked KDA from chunk to chunk."""
