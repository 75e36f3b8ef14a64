//! A full round of file operations with checked results.
