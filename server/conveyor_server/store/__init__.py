"""Where the state of sessions goes when it leaves the slab. Bytes only: what they mean is the keeper's business."""
