"""Sources of text: each gives documents, in tasks that workers can share."""
