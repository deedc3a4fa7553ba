"""How people meet the model: the Gradio page, its handlers and the backends behind them."""
