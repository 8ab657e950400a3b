"""Sessions: open, resume, fence, number, replay, expire, close."""
