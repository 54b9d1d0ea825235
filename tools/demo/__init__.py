"""`make demo` (`command`), the scenes it draws (`scenes`), and how its two pipelines were trained and measured."""
