"""Reading rows, turning them into conversations, and conversations into token ids."""
