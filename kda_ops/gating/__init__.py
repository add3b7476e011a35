"""The KDA gate and its chunk-local cumulative sum."""
