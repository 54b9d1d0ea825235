"""Look at programs and plans: as text, JSON, a drawing or a networkx graph, and explained node by node."""
