"""Fine-tune a sparse student against its dense teacher."""
