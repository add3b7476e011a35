"""Parts of one sequence worked on at the same time, where there are few heads."""
