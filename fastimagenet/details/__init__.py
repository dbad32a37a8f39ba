"""What a trained network does with every single image of an evaluation, as tables and a page."""
