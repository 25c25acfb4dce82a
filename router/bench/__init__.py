"""What the router costs by itself: stub workers that answer at once, and the benchmark that drives them."""
