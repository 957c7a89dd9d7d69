"""The model that guesses: its session, its graph, and the engines that run the graph."""
