//! The routes, one file for each group; `app` puts them together.

pub(crate) mod admin;
pub(crate) mod health;
pub(crate) mod metrics;
pub(crate) mod openai;
pub(crate) mod openapi;
pub(crate) mod tokenize;
