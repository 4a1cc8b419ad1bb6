//! The command language.
//!
//! A line becomes a [`Command`](command::Command) in [`parse`], from [`value`]s, the [`field`]s
//! that filters compare, and the [`service`]s of load balancing. The answer is a
//! [`Reply`](reply::Reply).

pub mod command;
pub mod field;
pub mod parse;
pub mod reply;
pub mod service;
pub mod value;
