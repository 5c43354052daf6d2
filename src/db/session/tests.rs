//! The statements on a real server: raced against each other, and compared with the model of the row.

// A race may be long.
#![allow(clippy::too_many_lines)]

use super::*;

mod conformance;
mod races;
