//! The library's threads under a model checker, with a model of the server. [`row`] is used by other tests, too.

pub(crate) mod row;
#[cfg(shuttle)]
mod scenarios;
