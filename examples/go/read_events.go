// Read the events of a ticket over Arrow Flight and count them.
//
//	go run . grpc://localhost:50051 'events:Order:now-1h:now:10000'
//	go run . --ca ca.pem --token-file token grpc+tls://HOST:50051 'events:Order:now-1h:now:10000'
//
// The stream is read batch by batch, so any range fits into memory. Nothing is printed unless all of it arrived.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/flight"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// access is what a server asks for that is not open to everyone: names of files, empty where they are not needed.
type access struct {
	ca, tokenFile, cert, key string
}

// secured says how to reach a server over TLS.
func (a access) secured() (credentials.TransportCredentials, error) {
	config := &tls.Config{}
	if a.ca != "" { // else the authorities of the system
		pem, err := os.ReadFile(a.ca)
		if err != nil {
			return nil, err
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("there is no certificate in %s", a.ca)
		}
	}
	if a.cert != "" {
		pair, err := tls.LoadX509KeyPair(a.cert, a.key)
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return credentials.NewTLS(config), nil
}

// summary is what the programs of every language print.
type summary struct {
	rows        int64
	withoutUser int
	dataBytes   int
	first, last time.Time
	byType      map[string]int
}

func (s *summary) add(batch arrow.RecordBatch) {
	column := func(name string) arrow.Array {
		return batch.Column(batch.Schema().FieldIndices(name)[0])
	}
	timestamps := column("timestamp").(*array.Timestamp)
	unit := timestamps.DataType().(*arrow.TimestampType).Unit
	types := column("entity_type").(*array.String)
	data := column("data").(*array.String)

	for row := range int(batch.NumRows()) {
		s.byType[types.Value(row)]++
		s.dataBytes += len(data.Value(row))
	}
	s.withoutUser += column("user_id").NullN()
	if rows := int(batch.NumRows()); rows > 0 {
		// Events come in the order of their timestamps.
		if s.rows == 0 {
			s.first = timestamps.Value(0).ToTime(unit)
		}
		s.last = timestamps.Value(rows - 1).ToTime(unit)
		s.rows += int64(rows)
	}
}

func (s *summary) print() {
	fmt.Printf("rows=%d\nwithout_user=%d\ndata_bytes=%d\n", s.rows, s.withoutUser, s.dataBytes)
	if s.rows > 0 {
		fmt.Printf("first=%s\nlast=%s\n", s.first.Format(time.RFC3339), s.last.Format(time.RFC3339))
	}
	types := make([]string, 0, len(s.byType))
	for name := range s.byType {
		types = append(types, name)
	}
	slices.Sort(types)
	for _, name := range types {
		fmt.Printf("%s=%d\n", name, s.byType[name])
	}
}

func read(url, ticket string, given access) (*summary, error) {
	scheme, address, _ := strings.Cut(url, "://")
	transport := insecure.NewCredentials()
	switch scheme {
	case "grpc":
	case "grpc+tls":
		secured, err := given.secured()
		if err != nil {
			return nil, err
		}
		transport = secured
	default:
		return nil, fmt.Errorf("the URL must be grpc://host:port or grpc+tls://host:port, got %q", url)
	}
	client, err := flight.NewClientWithMiddleware(address, nil, nil, grpc.WithTransportCredentials(transport))
	if err != nil {
		return nil, err
	}
	defer client.Close()

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if given.tokenFile != "" {
		token, err := os.ReadFile(given.tokenFile)
		if err != nil {
			return nil, err
		}
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+strings.TrimSpace(string(token)))
	}
	stream, err := client.DoGet(ctx, &flight.Ticket{Ticket: []byte(ticket)})
	if err != nil {
		return nil, err
	}
	reader, err := flight.NewRecordReader(stream)
	if err != nil {
		return nil, err
	}
	defer reader.Release()

	events := &summary{byType: map[string]int{}}
	var said []byte
	for reader.Next() {
		events.add(reader.RecordBatch())
		// The last batch has no rows, and a receipt as its metadata.
		said = reader.LatestAppMetadata()
	}
	if err := reader.Err(); err != nil {
		return nil, err
	}
	var receipt struct{ Rows *int64 }
	if json.Unmarshal(said, &receipt) != nil || receipt.Rows == nil || *receipt.Rows != events.rows {
		return nil, fmt.Errorf("the stream does not match its receipt after %d events; read it again", events.rows)
	}
	return events, nil
}

func main() {
	var given access
	flag.StringVar(&given.ca, "ca", "", "for grpc+tls://: PEM `file` of the authorities to trust, instead of the system's")
	flag.StringVar(&given.tokenFile, "token-file", "", "`file` that holds the bearer token")
	flag.StringVar(&given.cert, "cert", "", "PEM `file` of a client certificate, with -key")
	flag.StringVar(&given.key, "key", "", "PEM `file` of its private key")
	flag.Parse()
	if flag.NArg() != 2 || (given.cert == "") != (given.key == "") {
		fmt.Fprintln(os.Stderr, "usage: read_events [options] grpc://host:port TICKET")
		flag.PrintDefaults()
		os.Exit(2)
	}
	events, err := read(flag.Arg(0), flag.Arg(1), given)
	if err != nil {
		var refused interface{ GRPCStatus() *status.Status }
		if errors.As(err, &refused) {
			err = errors.New(refused.GRPCStatus().Message())
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	events.print()
}
