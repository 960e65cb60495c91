"""What only a run on a GPU needs: checks of each kernel, in processes that may die."""
