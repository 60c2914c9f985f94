NAMES = ("layerwise", "router", "easy_ep", "reap", "random")
