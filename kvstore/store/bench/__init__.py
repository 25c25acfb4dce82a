"""What the store costs and gives, each figure beside what it is to be judged by, in one run."""
