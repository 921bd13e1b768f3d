#!/usr/bin/env Rscript
# Read the events of a ticket over Arrow Flight into a data frame and count them.
#
#     Rscript read_events.R grpc://localhost:50051 'events:Order:now-1h:now:10000'
#     Rscript read_events.R --ca ca.pem --token-file token grpc+tls://HOST:50051 'events:Order:now-1h:now:10000'
#
# R speaks Flight through Python's pyarrow, by way of reticulate (as the arrow package does, too). RETICULATE_PYTHON names the
# Python that has pyarrow, if it is not the one on the path.

suppressPackageStartupMessages(library(reticulate))

# The Arrow table of a ticket; an R error if the server refuses it or the stream breaks off.
read_table <- function(url, ticket, ca = NULL, token = NULL, cert = NULL, key = NULL) {
  flight <- import("pyarrow.flight", convert = FALSE)
  client <- flight$connect(url, tls_root_certs = pem(ca), cert_chain = pem(cert), private_key = pem(key))
  on.exit(client$close())
  headers <- if (is.null(token)) list() else list(tuple(ascii("authorization"), ascii(paste("Bearer", token))))
  client$do_get(flight$Ticket(ticket), flight$FlightCallOptions(headers = headers))$read_all()
}

# The token that a file holds.
read_token <- function(file) if (is.null(file)) NULL else py_to_r(pem(file)$decode()$strip())

# Python's bytes of a text.
ascii <- function(text) import_builtins(convert = FALSE)$bytes(text, "ascii")

# The bytes of a PEM file, as Python has them.
pem <- function(file) if (is.null(file)) NULL else import("pathlib", convert = FALSE)$Path(file)$read_bytes()

# An Arrow table as a data frame: text as character, times as POSIXct in UTC, nulls as NA.
as_data_frame <- function(table) {
  pa <- import("pyarrow", convert = FALSE)
  column <- function(name) {
    values <- table$column(name)
    if (as_bool(pa$types$is_timestamp(values$type))) {
      # R counts seconds in a double, which holds them to the microsecond.
      micros <- values$cast(pa$timestamp("us", "UTC"), safe = FALSE)$cast(pa$int64())$cast(pa$float64())
      return(as.POSIXct(as_vector(micros, NA_real_) / 1e6, origin = "1970-01-01", tz = "UTC"))
    }
    as_vector(values, NA_character_)
  }
  names <- py_to_r(table$column_names)
  as.data.frame(setNames(lapply(names, column), names))
}

as_bool <- function(value) isTRUE(py_to_r(value))

as_vector <- function(values, missing) {
  vapply(py_to_r(values$to_pylist()), function(value) if (is.null(value)) missing else value, missing, USE.NAMES = FALSE)
}

main <- function(arguments) {
  options <- list()
  while (length(arguments) > 3 && arguments[[1]] %in% c("--ca", "--token-file", "--cert", "--key")) {
    options[[sub("--", "", arguments[[1]])]] <- arguments[[2]]
    arguments <- arguments[-(1:2)]
  }
  if (length(arguments) != 2 || is.null(options[["cert"]]) != is.null(options[["key"]])) {
    message("usage: read_events.R [--ca FILE] [--token-file FILE] [--cert FILE --key FILE] URL TICKET")
    quit(status = 2)
  }
  token <- read_token(options[["token-file"]])
  events <- as_data_frame(
    read_table(arguments[[1]], arguments[[2]], options[["ca"]], token, options[["cert"]], options[["key"]])
  )

  cat(sprintf("rows=%d\n", nrow(events)))
  cat(sprintf("without_user=%d\n", sum(is.na(events$user_id))))
  cat(sprintf("data_bytes=%.0f\n", sum(nchar(events$data, type = "bytes"))))
  if (nrow(events) > 0) {
    cat(sprintf("first=%s\n", format(min(events$timestamp), "%Y-%m-%dT%H:%M:%SZ")))
    cat(sprintf("last=%s\n", format(max(events$timestamp), "%Y-%m-%dT%H:%M:%SZ")))
  }
  by_type <- table(events$entity_type)
  cat(sprintf("%s=%d\n", names(by_type), by_type), sep = "")
}

tryCatch(
  main(commandArgs(trailingOnly = TRUE)),
  error = function(error) {
    # The sentence of the server stands between two marks of gRPC.
    message(sub("(?s)^.*?with message: (.*?)[.]? ?gRPC client debug context.*$", "\\1", conditionMessage(error), perl = TRUE))
    quit(status = 1)
  }
)
