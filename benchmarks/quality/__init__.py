"""What quantizing costs a model: methods and widths of ours, and other tools' quantizers beside them."""
