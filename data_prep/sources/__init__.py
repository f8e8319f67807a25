"""Where text comes from: a source gives documents, in tasks that workers can share."""
