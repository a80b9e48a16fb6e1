"""What the plug-ins for servers share: which part of a layer a rank holds, and its product on our backends."""
